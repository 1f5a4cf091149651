-- Announce what was stored of one workload: an event for followers, a change for the catalogue. Repeating it is harmless.
-- KEYS: events catalogue intents published.
-- ARGV: workload's digest, number of the outbox' first entry, the outbox, intent, most events to keep, how many
-- entries at the outbox' end are new.
local digest, first, outbox, new = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[6])
local before = tonumber(redis.call('HGET', KEYS[4], digest) or '0')
local behind = first + #outbox / 32
if behind <= before and new > 0 then
  -- another writer has announced them, just now; or the workload's master has failed over, and numbers anew
  local announced = false
  for _, event in ipairs(redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 256)) do
    if event[2][2] == digest and string.find(event[2][4], string.sub(outbox, -32), 1, true) then announced = true end
  end
  if not announced then before = behind - new end
end
if behind > before then
  if before < first then before = first end
  -- a number of the time: one that a failover has lost is not given again
  local now = redis.call('TIME')
  local last = tonumber(redis.call('HGET', KEYS[4], 'e') or '0')
  local number = math.max(last + 1, tonumber(now[1]) * 1000000 + tonumber(now[2]))
  redis.call('HSET', KEYS[4], 'e', string.format('%.0f', number))
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], string.format('%.0f-0', number), 'w', digest, 't',
    string.sub(outbox, (before - first) * 32 + 1), 'p', string.format('%.0f', last))
  redis.call('HSET', KEYS[4], digest, behind)
  before = behind
end
redis.call('ZADD', KEYS[2], redis.call('HINCRBY', KEYS[4], 'c', 1), digest)
if ARGV[4] ~= '' then redis.call('ZREM', KEYS[3], ARGV[4]) end
return before
