-- KEYS: lease and queue of each; ARGV: signature and ttl in ms of each.
-- Replies for each: 0 not ours, 1 extended, 2 extended and somebody waits.
-- A key of a wrong type is not ours.
local replies = {}
for i = 1, #KEYS, 2 do
  local reply = 0
  if redis.pcall('GET', KEYS[i]) == ARGV[i] then
    redis.call('PEXPIRE', KEYS[i], ARGV[i + 1])
    reply = 1 + redis.call('EXISTS', KEYS[i + 1])
  end
  replies[#replies + 1] = reply
end
return replies
