-- KEYS: lease and queue of each; ARGV: owner tag and TTL in ms of each.
-- Replies, one for each: 0 not ours, 1 extended, 2 extended and a cycle waits.
--
-- A key of a wrong type is not ours. A lease is never shortened: its owner relies on the expiry it
-- was last granted, whatever TTL that request had. A lease without expiry gets one.
local replies = {}
for i = 1, #KEYS, 2 do
  local reply = 0
  local owner = redis.pcall('GET', KEYS[i])
  if owner == ARGV[i] then
    if redis.call('PTTL', KEYS[i]) < tonumber(ARGV[i + 1]) then
      redis.call('PEXPIRE', KEYS[i], ARGV[i + 1])
    end
    reply = 1 + redis.call('EXISTS', KEYS[i + 1])
  elseif type(owner) == 'table' and string.sub(owner.err, 1, 9) ~= 'WRONGTYPE' then
    -- We may not see the owner because a permission was revoked: that is not a loss yet.
    return owner
  end
  replies[#replies + 1] = reply
end
return replies
