-- Store a workload and records of it, all or nothing.
-- KEYS: workload records heads changes facts condemned outbox meta days pending, then latency, time, best of each
-- group, then shared, verified of each look-up key.
-- ARGV: number of groups, number of look-up keys, group and facts of each group, id of each look-up key, how much of
-- the outbox is published, number of fields of the workload, these, then header and body of each record.
local K = {w=1, r=2, h=3, ch=4, f=5, c=6, o=7, m=8, d=9, p=10}
for name, at in pairs(K) do K[name] = KEYS[at] end
local groups, keys = tonumber(ARGV[1]), tonumber(ARGV[2])
local at = 3
local G = {}
for i = 1, groups do
  local k = 10 + (i - 1) * 3
  G[i] = {id = ARGV[at], facts = ARGV[at + 1], l = KEYS[k + 1], t = KEYS[k + 2], b = KEYS[k + 3],
          n = 0, valid = 0, verified = 0, live = 0, live_verified = 0}
  at = at + 2
end
local L = {}
for i = 1, keys do
  local k = 10 + groups * 3 + (i - 1) * 2
  L[i] = {id = ARGV[at], shared = KEYS[k + 1], verified = KEYS[k + 2]}
  at = at + 1
end
local published, fields = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
at = at + 2
if redis.call('EXISTS', K.w) == 0 then
  if fields == 0 then return redis.error_reply('UNKNOWN workload') end
  redis.call('HSET', K.w, unpack(ARGV, at, at + fields - 1))
end
at = at + fields

local now = redis.call('TIME')
local stamp = tonumber(now[1]) * 1000000 + tonumber(now[2])
local meta = redis.call('HMGET', K.m, 's', 'o')
if meta[1] and tonumber(meta[1]) >= stamp then stamp = tonumber(meta[1]) + 1 end
local first = tonumber(meta[2] or '0')
-- more can be published only of what a master has had that was lost in a failover
local numbered = first + redis.call('LLEN', K.o)
local packed_stamp = struct.pack('>d', stamp)

local stored, victims = 0, {}
while at < #ARGV do
  local header, body = ARGV[at], ARGV[at + 1]
  at = at + 2
  local trial, schedule = string.sub(header, 1, 32), string.sub(header, 33, 48)
  local g, k, flags, median, created, day = struct.unpack('>HHBddi4', header, 49)
  local group, key = G[g + 1], L[k + 1]
  local verified, failed, wrong = flags % 2 == 1, math.floor(flags / 2) % 2 == 1, math.floor(flags / 4) % 2 == 1
  if redis.call('HEXISTS', K.r, trial) == 0 then
    stored = stored + 1
    local since = redis.call('HGET', K.c, key.id .. schedule)
    local suffix, condemned = '', 0
    if since then
      condemned = tonumber(since)
      suffix = struct.pack('>d', condemned)
    end
    local flag = string.char(flags)
    redis.call('HSET', K.r, trial, group.id .. key.id .. schedule .. packed_stamp ..
      struct.pack('>ddd', created, median, condemned) .. flag .. body)
    local entry = trial .. packed_stamp .. struct.pack('>d', created) .. flag .. suffix
    redis.call('ZADD', group.l, median, entry)
    redis.call('ZADD', group.t, -created, trial .. packed_stamp .. flag .. suffix)
    if verified then redis.call('ZADD', group.b, median, entry) end
    group.n = group.n + 1
    if verified then group.verified = group.verified + 1 end
    if not failed then
      group.valid = group.valid + 1
      if not since then
        redis.call('ZADD', verified and key.verified or key.shared, median, trial .. schedule)
        group.live = group.live + 1
        if verified then group.live_verified = group.live_verified + 1 end
      end
    end
    redis.call('HINCRBY', K.d, day, 1)
    redis.call('RPUSH', K.o, trial)
    if wrong and not since then
      redis.call('HSET', K.c, key.id .. schedule, string.format('%.0f', stamp))
      for _, name in ipairs({key.shared, key.verified}) do
        for _, member in ipairs(redis.call('ZRANGE', name, 0, -1)) do
          if string.sub(member, 33) == schedule then
            redis.call('ZREM', name, member)
            local victim = string.sub(member, 1, 32)
            redis.call('HSET', K.p, victim, string.format('%.0f', stamp))
          end
        end
      end
    end
  end
end

local ended = string.format('%.0f', stamp)
redis.call('HSET', K.m, 's', ended)
for i = 1, groups do
  local group = G[i]
  if group.n > 0 then
    redis.call('HSETNX', K.f, group.id, group.facts)
    local n, valid, verified, live, live_verified, born = 0, 0, 0, 0, 0, stamp
    local head = redis.call('HGET', K.h, group.id)
    if head then
      n, valid, verified, live, live_verified, born = struct.unpack('>I4I4I4I4I4d', head)
      if n == 0 then born = stamp end
    end
    local best = redis.call('ZRANGE', group.l, 0, 0, 'WITHSCORES')[2]
    local newest = redis.call('ZRANGE', group.t, 0, 0, 'WITHSCORES')[2]
    redis.call('HSET', K.h, group.id, struct.pack('>I4I4I4I4I4ddd', n + group.n, valid + group.valid,
      verified + group.verified, live + group.live, live_verified + group.live_verified, born,
      tonumber(best), -tonumber(newest)))
    redis.call('ZADD', K.ch, ended, group.id)
  end
end
if published > first and published <= numbered then
  redis.call('LTRIM', K.o, published - first, -1)
  redis.call('HSET', K.m, 'o', published)
  first = published
end
return {stored, first, table.concat(redis.call('LRANGE', K.o, 0, -1)), redis.call('HGETALL', K.p)}
