-- Functions specific to a cluster.

-- Whether an inbox is subscribed on this very node. The count returned by SPUBLISH does not prove
-- it: subscribers on replicas also receive the message but are not counted.
local function is_subscribed(inbox)
  return redis.call('PUBSUB', 'SHARDNUMSUB', inbox)[2] > 0
end

-- Sends a message to a manager.
local function notify(inbox, message)
  redis.call('SPUBLISH', inbox, message)
end

-- How far a counter is raised above the server's time: 20 ms, in numbers. Until then, clients
-- reserve numbers without a script: see raised.rs. COUNTER_AHEAD in script.rs is the same.
local AHEAD = 160000

-- Reserves n numbers and returns the largest. A promoted replica may have missed the latest ones,
-- and no client can detect that. The counter therefore follows the server's time, which grows
-- faster than any load reserves numbers and is thus ahead of those missed. Clock differences
-- between nodes matter only at that moment, and the caller's floor still keeps its own tokens in
-- order.
local function reserve(n, floor)
  local time = redis.call('TIME')
  local now = (tonumber(time[1]) - 1735689600) * 8000000 + tonumber(time[2]) * 8
  local last = math.max(floor, now + AHEAD) + n
  -- One call in place of two, for the usual case that the counter is behind.
  local before = tonumber(redis.call('SET', KEYS[3], string.format('%.0f', last), 'GET') or 0)
  if before + n > last then
    last = before + n
    redis.call('SET', KEYS[3], string.format('%.0f', last))
  end
  return last
end

