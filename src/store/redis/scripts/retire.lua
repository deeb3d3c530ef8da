-- Releases a lease whose min_hold has not passed: it stays for the rest of that time, under a
-- owner tag that no cycle has. So nothing that was sent for its cycle can extend or end it later.
--
-- Comes after single.lua or cluster.lua, with notify().
--
-- KEYS: 1 lease, 2 queue, 3 counter of the slot.
-- ARGV: 1 owner tag, 2 owner tag of the retired lease, 3 milliseconds left, 4 channel prefix,
-- 5 key.
-- Replies: 1 retired | 0 it is not ours and nothing was done
local me, retired, left, channel, key = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if redis.call('GET', KEYS[1]) ~= me then
  return 0
end
-- Never extend the lease.
local ttl = redis.call('PTTL', KEYS[1])
if ttl >= 0 and ttl < left then
  left = math.max(ttl, 1)
end
redis.call('SET', KEYS[1], retired, 'PX', left)
-- Those who asked before expect a later end. If the first of them give up, others may be next.
for _, waiter in ipairs(redis.call('ZRANGE', KEYS[2], 0, 9)) do
  local manager, cycle = string.match(waiter, '^([^:]+):(.+)$')
  notify(channel .. manager, 't ' .. cycle .. ' ' .. key)
end
return 1
