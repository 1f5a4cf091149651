-- Move a record from one group to another of the same look-up key: its tags have changed.
-- KEYS: records heads changes facts meta, latency, time, best of the old group, the same of the new one.
-- ARGV: trial id, old group, new group, facts of the new group. Returns 0 when it is not in the old group any more.
local trial, old, new = ARGV[1], ARGV[2], ARGV[3]
local record = redis.call('HGET', KEYS[1], trial)
if not record or string.sub(record, 1, 16) ~= old then return 0 end
local now = redis.call('TIME')
local stamp = tonumber(now[1]) * 1000000 + tonumber(now[2])
local last = redis.call('HGET', KEYS[5], 's')
if last and tonumber(last) >= stamp then stamp = tonumber(last) + 1 end
local stored, created, median, condemned = struct.unpack('>dddd', record, 49)
local flag = string.sub(record, 81, 81)
local flags = string.byte(flag)
local verified, failed = flags % 2 == 1, math.floor(flags / 2) % 2 == 1
local suffix = condemned > 0 and string.sub(record, 73, 80) or ''
local entry = trial .. string.sub(record, 49, 64) .. flag .. suffix
local dated = trial .. string.sub(record, 49, 56) .. flag .. suffix
redis.call('ZREM', KEYS[6], entry)
redis.call('ZREM', KEYS[7], dated)
redis.call('ZREM', KEYS[8], entry)
redis.call('ZADD', KEYS[9], median, entry)
redis.call('ZADD', KEYS[10], -created, dated)
if verified then redis.call('ZADD', KEYS[11], median, entry) end
redis.call('HSET', KEYS[1], trial, new .. string.sub(record, 17))
redis.call('HSETNX', KEYS[4], new, ARGV[4])
local ended = string.format('%.0f', stamp)
redis.call('HSET', KEYS[5], 's', ended)
local function count(group, latency, time, change)
  local n, valid, verified_n, live, live_verified, born = 0, 0, 0, 0, 0, stamp
  local head = redis.call('HGET', KEYS[2], group)
  if head then
    n, valid, verified_n, live, live_verified, born = struct.unpack('>I4I4I4I4I4d', head)
    if n == 0 then born = stamp end
  end
  n = n + change
  if not failed then valid = valid + change end
  if verified then verified_n = verified_n + change end
  if not failed and condemned == 0 then
    live = live + change
    if verified then live_verified = live_verified + change end
  end
  local best = redis.call('ZRANGE', latency, 0, 0, 'WITHSCORES')[2]
  local newest = redis.call('ZRANGE', time, 0, 0, 'WITHSCORES')[2]
  redis.call('HSET', KEYS[2], group, struct.pack('>I4I4I4I4I4ddd', n, valid, verified_n, live, live_verified, born,
    tonumber(best or 'inf'), -tonumber(newest or '0')))
  redis.call('ZADD', KEYS[3], ended, group)
  if n == 0 then redis.call('HDEL', KEYS[4], group) end
end
count(old, KEYS[6], KEYS[7], -1)
count(new, KEYS[9], KEYS[10], 1)
return 1
