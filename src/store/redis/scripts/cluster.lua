-- What is particular to a cluster.

-- Sends a manager a message. Returns how many received it. Whoever listens on a replica gets what is published here as well, but is not
-- counted: who is not counted must not be told, or both it and the next would take the lease for theirs.
local function tell(inbox, message)
  if redis.call('PUBSUB', 'SHARDNUMSUB', inbox)[2] == 0 then
    return 0
  end
  return redis.call('SPUBLISH', inbox, message)
end

-- Reserves n numbers and returns the largest. A replica that takes over may have missed the last of them, and no client can tell when: so
-- the counter follows the server's time, which is ahead of what any load reserves, and so ahead of what the replica missed.
-- Clocks of nodes that differ only matter in that moment, and then the caller's floor still keeps its own tokens in order.
local function reserve(n, floor)
  local time = redis.call('TIME')
  local now = (tonumber(time[1]) - 1735689600) * 8000000 + tonumber(time[2]) * 8
  local last = math.max(tonumber(redis.call('GET', KEYS[3]) or 0), floor, now) + n
  redis.call('SET', KEYS[3], string.format('%.0f', last))
  return last
end

