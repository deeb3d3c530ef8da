-- The release of the fast path: the lease is ours and no cycle waits. Takes few keys and arguments,
-- since each one costs time.
--
-- KEYS: 1 lease, 2 queue. ARGV: 1 owner tag.
-- Replies: 1 released | 0 nothing was done, release.lua must run
if redis.call('GET', KEYS[1]) == ARGV[1]
  and redis.call('EXISTS', KEYS[2]) == 0 then
  return redis.call('DEL', KEYS[1])
end
return 0
