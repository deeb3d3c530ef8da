-- Shared by the scripts that acquire and release. Before it come single.lua or cluster.lua, with
-- is_subscribed(), notify() and reserve().
--
-- KEYS: 1 lease, 2 queue (sorted set of owner tags, scored by the counter at enqueue, plus a half
-- if the inbox was not subscribed here), 3 counter of the slot.

-- The lease while shared leases and permits have the key: see modes.lua. No manager and no other
-- library writes this value.
local MARKER = '~shared'

-- The manager, the cycle and the TTL of an owner tag; nil for a value that another library wrote. A
-- owner tag is `<manager>:<cycle>`, a cycle `<number>-<ttl>-<code>`.
local function parse_owner_tag(owner_tag)
  local manager, cycle, ttl = string.match(owner_tag, '^([%w%.%-]+):(%d+%-(%d+)%-%x%x%x%x%x%x%x%x)$')
  -- `<host>-<process id>-<16 digits>`, matched from the end: a single pattern would try each dash.
  if manager and string.find(manager, '^%-%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x$', -17)
    and string.find(string.sub(manager, -29, -18), '.%-%d+$') then
    return manager, cycle, ttl
  end
end

-- Whether the owner of a cycle asked to be notified when a waiter enqueues: its number is even.
local function wants_notice(cycle)
  return tonumber(string.match(cycle, '(%d)%-')) % 2 == 0
end

-- A manager whose inbox is not subscribed on this server polls every quarter of a second instead.
-- When its turn comes, the lease is held for its next request for at most this many milliseconds.
local UNNOTIFIED_LEASE = 1000

-- If all waiters die, their queue outlives the lease by this many milliseconds.
local QUEUE_GRACE = 60000

-- The reply to a queued cycle: 2, mark, remaining TTL of the owner (-1: no expiry), whether the
-- owner is foreign, how many are ahead, whether a grant would reach it. `left` is that TTL, if
-- known.
local function queued(mark, foreign, ahead, reached, left)
  left = left and tonumber(left) or redis.call('PTTL', KEYS[1])
  -- Formatted here: the server would use 17 digits, which takes several times as long.
  redis.call('PEXPIRE', KEYS[2], string.format('%d', math.max(left, 0) + QUEUE_GRACE))
  return {2, mark, left, foreign and 1 or 0, ahead, reached and 1 or 0}
end

-- Enqueues the cycle unless it is queued already. Returns its mark, how many are ahead, whether it
-- was newly added, and whether a grant would reach its inbox.
local function join(me, floor, inbox)
  local mark = reserve(1, floor)
  local reached = is_subscribed(inbox)
  local score = reached and string.format('%.0f', mark) or string.format('%.1f', mark + 0.5)
  if redis.call('ZADD', KEYS[2], 'NX', score, me) == 1 then
    return mark, redis.call('ZCARD', KEYS[2]) - 1, true, reached
  end
  local rank = redis.call('ZRANK', KEYS[2], me)
  if not reached then
    local joined = redis.call('ZRANGE', KEYS[2], rank, rank, 'WITHSCORES')[2]
    if not string.find(joined, '.5', 1, true) then
      redis.call('ZADD', KEYS[2], 'XX', joined .. '.5', me)
    end
  end
  return mark, rank, false, reached
end

