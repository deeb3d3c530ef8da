-- Takes or extends a lease at a node of a quorum for a cycle that has it at the door. No queue is looked at: the order
-- is the door's.
--
-- KEYS: 1 lease, 2 counter of the slot.
-- ARGV: 1 signature, 2 ttl in ms, 3 the least that the counter becomes, 4 floor, 5 'take' or 'extend'.
-- Replies: {0, owner's ttl} it is not ours | {1, the counter as it was before it was raised to the least}
local owner = redis.call('GET', KEYS[1])
if owner ~= ARGV[1] and (owner or ARGV[5] == 'extend') then
  return {0, redis.call('PTTL', KEYS[1])}
end
if not owner then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
local count, least, floor = tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3]), tonumber(ARGV[4])
if count < floor then
  -- It was lost: see reserve in common.lua.
  local time = redis.call('TIME')
  count = math.max(floor, (tonumber(time[1]) - 1735689600) * 8000000 + tonumber(time[2]) * 8)
end
redis.call('SET', KEYS[2], string.format('%.0f', math.max(count, least)))
return {1, count}
