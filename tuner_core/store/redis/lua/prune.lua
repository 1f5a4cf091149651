-- Delete old records of one group; the best of the look-up key and verified records stay.
-- KEYS: records heads changes facts meta days pending, latency, time of the group, shared, verified of the look-up key.
-- ARGV: group, limit in seconds since the epoch, how many old records were looked at and kept, how many to look at,
-- 1 to delete. Returns how many were kept, how many are prunable, and the trial ids of the deleted.
local group, deleting = ARGV[1], ARGV[5] == '1'
local best = redis.call('ZRANGE', KEYS[11], 0, 0)[1] or redis.call('ZRANGE', KEYS[10], 0, 0)[1] or ''
best = string.sub(best, 1, 32)
local members = redis.call('ZRANGE', KEYS[9], '(' .. ARGV[2], '+inf', 'BYSCORE', 'LIMIT', ARGV[3], ARGV[4])
local kept, prunable, deleted = 0, 0, {}
local valid, live = 0, 0
for _, dated in ipairs(members) do
  local trial = string.sub(dated, 1, 32)
  local flag = string.sub(dated, 41, 41)
  local flags = string.byte(flag)
  if flags % 2 == 1 or trial == best then
    kept = kept + 1
  else
    prunable = prunable + 1
    if deleting then
      local record = redis.call('HGET', KEYS[1], trial)
      if record then
        local stored, created = struct.unpack('>dd', record, 49)
        local suffix = string.sub(dated, 42)
        redis.call('ZREM', KEYS[8], trial .. string.sub(record, 49, 64) .. flag .. suffix)
        redis.call('ZREM', KEYS[10], trial .. string.sub(record, 33, 48))
        redis.call('HDEL', KEYS[1], trial)
        redis.call('HDEL', KEYS[7], trial)
        redis.call('HINCRBY', KEYS[6], string.format('%.0f', math.floor(created / 86400)), -1)
        if math.floor(flags / 2) % 2 == 0 then
          valid = valid + 1
          if suffix == '' then live = live + 1 end
        end
      end
      redis.call('ZREM', KEYS[9], dated)
      deleted[#deleted + 1] = trial
    end
  end
end
if #deleted > 0 then
  local now = redis.call('TIME')
  local stamp = tonumber(now[1]) * 1000000 + tonumber(now[2])
  local last = redis.call('HGET', KEYS[5], 's')
  if last and tonumber(last) >= stamp then stamp = tonumber(last) + 1 end
  local ended = string.format('%.0f', stamp)
  redis.call('HSET', KEYS[5], 's', ended)
  local head = redis.call('HGET', KEYS[2], group)
  local n, valid_n, verified, live_n, live_verified, born = struct.unpack('>I4I4I4I4I4d', head)
  n = n - #deleted
  local first = redis.call('ZRANGE', KEYS[8], 0, 0, 'WITHSCORES')[2]
  local newest = redis.call('ZRANGE', KEYS[9], 0, 0, 'WITHSCORES')[2]
  redis.call('HSET', KEYS[2], group, struct.pack('>I4I4I4I4I4ddd', n, valid_n - valid, verified, live_n - live,
    live_verified, born, tonumber(first or 'inf'), -tonumber(newest or '0')))
  redis.call('ZADD', KEYS[3], ended, group)
  if n == 0 then redis.call('HDEL', KEYS[4], group) end
end
return {kept, prunable, deleted, #members}
