-- The way back of the free path: ours, and nobody waits. Few keys and arguments, since each costs time.
--
-- KEYS: 1 lease, 2 queue. ARGV: 1 signature.
-- Replies: 1 released | 0 nothing was done, and release.lua has to look.
if redis.call('GET', KEYS[1]) == ARGV[1]
  and redis.call('EXISTS', KEYS[2]) == 0 then
  return redis.call('DEL', KEYS[1])
end
return 0
