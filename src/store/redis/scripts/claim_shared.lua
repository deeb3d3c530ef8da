-- The same as claim.lua for a shared lease. A node admits any number of them, but none beside an
-- exclusive lease: a majority of a writer and one of a reader have a node in common, which refuses
-- one of them. Comes after claim_counter.lua.
--
-- KEYS: 1 lease, 2 counter of the slot, 3 queue, 4 holders (see modes.lua).
-- ARGV: see claim.lua.
-- Replies: {0} not ours | {1, the counter before it was raised to the minimum}
local MARKER = '~shared'
local me, ttl = ARGV[1], tonumber(ARGV[2])
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= MARKER then
  return {0}
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if not owner then
  -- The lease was deleted or has expired: the members of the set are no longer holders.
  redis.call('DEL', KEYS[4])
end
-- Holders that died, so that the set does not grow: no other script runs on this node while
-- another one is the sequencer.
local first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
while first[1] and tonumber(first[2]) <= now do
  redis.call('ZREM', KEYS[4], first[1])
  first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
end
local rank = redis.call('ZRANK', KEYS[4], me)
if not rank then
  if ARGV[5] == 'extend' then
    return {0}
  end
  redis.call('ZREM', KEYS[3], me)
end
-- Never shorten a lease: see renew.lua.
if not rank or tonumber(redis.call('ZRANGE', KEYS[4], rank, rank, 'WITHSCORES')[2]) < now + ttl then
  redis.call('ZADD', KEYS[4], string.format('%.0f', now + ttl), me)
end
if redis.call('PTTL', KEYS[1]) < ttl then
  redis.call('SET', KEYS[1], MARKER, 'PX', ttl)
end
if redis.call('PTTL', KEYS[4]) < ttl then
  redis.call('PEXPIRE', KEYS[4], ttl)
end
return {1, raise(KEYS[2], tonumber(ARGV[3]), tonumber(ARGV[4]))}
