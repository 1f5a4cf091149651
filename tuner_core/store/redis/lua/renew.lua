-- KEYS: the claim. ARGV: token, time to live in ms (negative: give it back), how long to remember an ended claim in ms.
local found = redis.call('HMGET', KEYS[1], 'token', 'holder')
if not found[1] or found[1] ~= ARGV[1] or found[2] == '' then return 0 end
local ttl = tonumber(ARGV[2])
if ttl < 0 then
  redis.call('HSET', KEYS[1], 'holder', '')
  ttl = 0
else
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'ends', string.format('%.0f', tonumber(now[1]) * 1000000 + tonumber(now[2]) + ttl * 1000))
end
redis.call('PEXPIRE', KEYS[1], ttl + tonumber(ARGV[3]))
return 1
