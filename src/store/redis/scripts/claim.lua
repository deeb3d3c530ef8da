-- Takes or extends a lease on a node of a quorum, for a cycle that holds it on the sequencer. The
-- queue decides nothing here: the sequencer decides the order. A cycle leaves the queue when it
-- takes the lease: it may have waited here while this node was the sequencer, and a later release
-- would grant the lease to it again. Comes after claim_counter.lua.
--
-- KEYS: 1 lease, 2 counter of the slot, 3 queue.
-- ARGV: 1 owner tag, 2 TTL in ms, 3 minimum value for the counter, 4 floor, 5 'take' or 'extend'.
-- Replies: {0} not ours | {1, the counter before it was raised to the minimum}
local owner = redis.call('GET', KEYS[1])
if owner ~= ARGV[1] and (owner or ARGV[5] == 'extend') then
  return {0}
end
if not owner then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
elseif redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return {1, raise(KEYS[2], tonumber(ARGV[3]), tonumber(ARGV[4]))}
