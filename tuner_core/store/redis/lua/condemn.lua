-- Let the indexes of groups say that schedules were found wrong.
-- KEYS: records heads changes meta pending, then latency, time, best of each group.
-- ARGV: number of groups, id of each, then trial ids.
local groups = tonumber(ARGV[1])
local G = {}
for i = 1, groups do
  G[ARGV[1 + i]] = {l = KEYS[3 + i * 3], t = KEYS[4 + i * 3], b = KEYS[5 + i * 3], live = 0, live_verified = 0}
end
local now = redis.call('TIME')
local stamp = tonumber(now[1]) * 1000000 + tonumber(now[2])
local last = redis.call('HGET', KEYS[4], 's')
if last and tonumber(last) >= stamp then stamp = tonumber(last) + 1 end
local done = 0
for i = 2 + groups, #ARGV do
  local trial = ARGV[i]
  local since = redis.call('HGET', KEYS[5], trial)
  local record = redis.call('HGET', KEYS[1], trial)
  local group = record and G[string.sub(record, 1, 16)]
  if since and group then
    local condemned = tonumber(since)
    local stored, created, median, before = struct.unpack('>dddd', record, 49)
    local flag = string.sub(record, 81, 81)
    if before == 0 then
      local suffix = struct.pack('>d', condemned)
      local entry = trial .. string.sub(record, 49, 64) .. flag
      redis.call('ZREM', group.l, entry)
      redis.call('ZADD', group.l, median, entry .. suffix)
      if redis.call('ZREM', group.b, entry) == 1 then redis.call('ZADD', group.b, median, entry .. suffix) end
      local dated = trial .. string.sub(record, 49, 56) .. flag
      redis.call('ZREM', group.t, dated)
      redis.call('ZADD', group.t, -created, dated .. suffix)
      redis.call('HSET', KEYS[1], trial, string.sub(record, 1, 72) .. suffix .. string.sub(record, 81))
      group.live = group.live + 1
      if string.byte(flag) % 2 == 1 then group.live_verified = group.live_verified + 1 end
    end
  end
  if since and (group or not record) then
    redis.call('HDEL', KEYS[5], trial)
    done = done + 1
  end
end
local ended = string.format('%.0f', stamp)
redis.call('HSET', KEYS[4], 's', ended)
for id, group in pairs(G) do
  local head = redis.call('HGET', KEYS[2], id)
  if head and group.live > 0 then
    local n, valid, verified, live, live_verified, born, best, newest = struct.unpack('>I4I4I4I4I4ddd', head)
    redis.call('HSET', KEYS[2], id, struct.pack('>I4I4I4I4I4ddd', n, valid, verified, live - group.live,
      live_verified - group.live_verified, born, best, newest))
    redis.call('ZADD', KEYS[3], ended, id)
  end
end
return done
