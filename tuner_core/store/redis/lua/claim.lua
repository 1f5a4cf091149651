-- KEYS: the claim. ARGV: holder, time to live in ms, how long to remember an ended claim in ms.
local now = redis.call('TIME')
local us = tonumber(now[1]) * 1000000 + tonumber(now[2])
local found = redis.call('HMGET', KEYS[1], 'token', 'holder', 'ends')
local token, holder, ends = tonumber(found[1] or '0'), found[2] or '', tonumber(found[3] or '0')
if holder ~= '' and ends > us and holder ~= ARGV[1] then
  return {string.format('%.0f', token), holder, 0, math.floor((ends - us) / 1000)}
end
if holder ~= ARGV[1] or ends <= us then
  -- a time, so that tokens grow even after an ended claim was forgotten
  if us > token then token = us else token = token + 1 end
end
redis.call('HSET', KEYS[1], 'token', string.format('%.0f', token), 'holder', ARGV[1],
  'ends', string.format('%.0f', us + tonumber(ARGV[2]) * 1000))
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[2]) + tonumber(ARGV[3]))
return {string.format('%.0f', token), ARGV[1], 1, tonumber(ARGV[2])}
