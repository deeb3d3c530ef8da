-- KEYS: lease and queue of each; ARGV: signature and ttl in ms of each.
-- Replies for each: 0 not ours, 1 extended, 2 extended and somebody waits.
-- A key of a wrong type is not ours. The end of a lease moves on, never back: its owner counts on what it was told before,
-- with whatever TTL it asked then. A lease without an end gets one.
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
    -- The server does not let us see whose it is (a permission was taken away): that is no loss yet.
    return owner
  end
  replies[#replies + 1] = reply
end
return replies
