-- Which workloads changed behind a change, and which writers died on the way; and in which history of the data: a
-- master that was promoted or started again may not have all changes that were seen.
-- KEYS: catalogue intents. ARGV: number of the last change seen, age in microseconds from which an intent is a dead writer's.
local now = redis.call('TIME')
local stamp = tonumber(now[1]) * 1000000 + tonumber(now[2])
return {
  string.format('%.0f', stamp),
  redis.call('ZRANGE', KEYS[1], '(' .. ARGV[1], '+inf', 'BYSCORE', 'WITHSCORES'),
  redis.call('ZRANGE', KEYS[2], '-inf', string.format('%.0f', stamp - tonumber(ARGV[2])), 'BYSCORE'),
  string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or '',
}
