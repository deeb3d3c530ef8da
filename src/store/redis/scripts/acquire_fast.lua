-- The acquire of the fast path in a cluster: the key is free and no cycle waits. Comes after
-- cluster.lua, with reserve(), and is short, since defining functions costs time.
--
-- KEYS: 1 lease, 2 queue, 3 counter of the slot. ARGV: 1 owner tag, 2 TTL in ms, 3 tokens to
-- reserve, 4 floor.
-- Replies: {0} nothing was done, the key is taken or has waiters | {1, largest token, 0, 0}
if redis.call('EXISTS', KEYS[2]) == 1
  or not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return {0}
end
return {1, reserve(ARGV[3], tonumber(ARGV[4])), 0, 0}
