-- What is particular to a single primary.

-- Whether an inbox is subscribed on this very server. The count that PUBLISH returns does not tell:
-- subscribers at replicas receive the message as well, uncounted.
local function is_subscribed(inbox)
  return redis.call('PUBSUB', 'NUMSUB', inbox)[2] > 0
end

-- Sends a manager a message.
local function notify(inbox, message)
  redis.call('PUBLISH', inbox, message)
end

-- Reserves n numbers and returns the largest. A counter below the caller's floor was lost (a flush, a restart without
-- data, an old replica): it is raised to the larger of the floor and the server's time first, so that it never goes back.
local function reserve(n, floor)
  local last = redis.call('INCRBY', KEYS[3], n)
  if last - n < floor then
    local time = redis.call('TIME')
    local now = (tonumber(time[1]) - 1735689600) * 8000000 + tonumber(time[2]) * 8
    last = math.max(floor, now) + n
    redis.call('SET', KEYS[3], string.format('%.0f', last))
  end
  return last
end

