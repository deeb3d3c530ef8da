-- Renews one lease without accessing its queue: a script with a single key is executed even while
-- its slot is being moved.
--
-- KEYS: 1 lease. ARGV: 1 owner tag, 2 TTL in ms.
-- Replies: {0} not ours | {1} extended. See renew.lua.
local owner = redis.pcall('GET', KEYS[1])
if type(owner) == 'table' and string.sub(owner.err, 1, 9) ~= 'WRONGTYPE' then
  return owner
end
if owner ~= ARGV[1] then
  return {0}
end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return {1}
