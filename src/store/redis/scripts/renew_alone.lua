-- Renews one lease where its queue can't be looked at: a script of one key is answered also while its slot moves.
--
-- KEYS: 1 lease. ARGV: 1 signature, 2 ttl in ms. Replies: {0} not ours | {1} extended. See renew.lua.
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then
  return {0}
end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return {1}
