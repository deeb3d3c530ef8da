-- Renews shared leases and permits: see modes.lua, and renew.lua for the rules.
--
-- KEYS: lease, queue and holders of each; ARGV: owner tag and TTL in ms of each.
-- Replies, one for each: 0 not ours, 1 extended, 2 extended and a cycle waits.
local MARKER = '~shared'
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local replies = {}
for i = 1, #KEYS, 3 do
  local reply = 0
  local me, ttl = ARGV[(i - 1) / 3 * 2 + 1], tonumber(ARGV[(i - 1) / 3 * 2 + 2])
  local lease = redis.pcall('GET', KEYS[i])
  if lease == MARKER then
    local rank = redis.call('ZRANK', KEYS[i + 2], me)
    local ends = rank and tonumber(redis.call('ZRANGE', KEYS[i + 2], rank, rank, 'WITHSCORES')[2])
    if ends and ends > now then
      -- First, and always: a server that is out of memory refuses a script whose first write could
      -- need some, but none of those after it.
      local left = redis.call('PTTL', KEYS[i])
      redis.call('PEXPIRE', KEYS[i], math.max(left, ttl))
      if ends < now + ttl then
        redis.call('ZADD', KEYS[i + 2], 'XX', string.format('%.0f', now + ttl), me)
      end
      if redis.call('PTTL', KEYS[i + 2]) < ttl then
        redis.call('PEXPIRE', KEYS[i + 2], ttl)
      end
      reply = 1 + redis.call('EXISTS', KEYS[i + 1])
    end
  elseif type(lease) == 'table' and string.sub(lease.err, 1, 9) ~= 'WRONGTYPE' then
    return lease
  end
  replies[#replies + 1] = reply
end
return replies
