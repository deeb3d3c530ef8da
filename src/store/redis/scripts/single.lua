-- Functions specific to a single primary.

-- Whether an inbox is subscribed on this very server. The count returned by PUBLISH does not prove
-- it: subscribers on replicas also receive the message but are not counted.
local function is_subscribed(inbox)
  return redis.call('PUBSUB', 'NUMSUB', inbox)[2] > 0
end

-- Sends a message to a manager.
local function notify(inbox, message)
  redis.call('PUBLISH', inbox, message)
end

-- Reserves n numbers and returns the largest. On frequent paths, n is text: the server formats a
-- number with 17 digits. A counter below the caller's floor was lost (a flush, a restart without
-- data, an old replica). It is first raised to the larger of the floor and the server's time, so it
-- never decreases.
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

