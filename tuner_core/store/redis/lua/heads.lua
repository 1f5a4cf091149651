-- Groups of a workload that changed behind a stamp, with what they have in common where that is new.
-- KEYS: changes heads facts workload. ARGV: stamp.
local changed = redis.call('ZRANGE', KEYS[1], '(' .. ARGV[1], '+inf', 'BYSCORE', 'WITHSCORES')
local last = tonumber(ARGV[1])
local found = {ARGV[1] == '0' and redis.call('HGET', KEYS[4], 'args_info') or '', ARGV[1]}
for i = 1, #changed, 2 do
  local head = redis.call('HGET', KEYS[2], changed[i])
  if head then
    local facts = ''
    if struct.unpack('>d', head, 21) > last then facts = redis.call('HGET', KEYS[3], changed[i]) or '' end
    found[#found + 1] = changed[i]
    found[#found + 1] = head
    found[#found + 1] = facts
  end
  found[2] = changed[i + 1]
end
return found
