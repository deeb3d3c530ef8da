-- What is particular to a cluster.

-- Whether an inbox is subscribed on this very node. The count that SPUBLISH returns does not tell:
-- subscribers at replicas receive the message as well, uncounted.
local function is_subscribed(inbox)
  return redis.call('PUBSUB', 'SHARDNUMSUB', inbox)[2] > 0
end

-- Sends a manager a message.
local function notify(inbox, message)
  redis.call('SPUBLISH', inbox, message)
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

