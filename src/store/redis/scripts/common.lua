-- Shared by acquire.lua and release.lua, which follow in the same script. Before it come single.lua
-- or cluster.lua, with is_subscribed(), notify() and reserve(), and extend.lua.
--
-- KEYS: 1 lease, 2 queue (sorted set of signatures, scored by the counter at enqueue, plus a half
-- if the inbox was not subscribed here), 3 counter of the slot.

-- The manager, the cycle and the TTL of a signature; nil for a value that another library wrote. A
-- signature is `<manager>:<cycle>`, a cycle `<number>-<ttl>-<code>`.
local function signed(signature)
  local manager, cycle, ttl = string.match(signature, '^([%w%.%-]+):(%d+%-(%d+)%-%x%x%x%x%x%x%x%x)$')
  -- `<host>-<process id>-<16 digits>`, matched from the end: a single pattern would try each dash.
  if manager and string.find(manager, '^%-%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x$', -17)
    and string.find(string.sub(manager, -29, -18), '.%-%d+$') then
    return manager, cycle, ttl
  end
end

-- The same for a queue member. Only managers write to the queue.
local function member(signature)
  return string.match(signature, '^([^:]+):(%d+%-(%d+)%-%x+)$')
end

-- Whether the owner of a cycle asked to be notified when a waiter enqueues: its number is even.
local function wants_notice(cycle)
  return tonumber(string.match(cycle, '(%d)%-')) % 2 == 0
end

-- A manager whose inbox is not subscribed on this server polls every quarter of a second instead.
-- When its turn comes, the lease is held for its next request for at most this many milliseconds.
local UNNOTIFIED_LEASE = 1000

-- Makes the head of the queue the owner and notifies it. If its inbox is not reachable, the next
-- one is tried. Nothing was published to the skipped waiter and no token was reserved for it, so it
-- can never enter. `me` learns of the grant from the reply instead; its lease lasts for `my_ttl`,
-- any other for the TTL of its cycle. `waiting` is the length of the queue, if known. Returns the
-- new owner, its largest token, the number of remaining waiters and the TTL of its lease; deletes
-- the lease if no waiter is left. Does not access the queue once it is empty: while a cluster slot
-- is being moved, a missing key can't be accessed.
local function pass_on(me, my_ttl, n, floor, channel, key, waiting)
  waiting = waiting or redis.call('ZCARD', KEYS[2])
  while waiting > 0 do
    local popped = redis.call('ZPOPMIN', KEYS[2])
    local heir, score = popped[1], popped[2]
    waiting = waiting - 1
    local manager, cycle, ttl = member(heir)
    if heir == me then
      local last = reserve(n, floor)
      redis.call('SET', KEYS[1], heir, 'PX', my_ttl)
      return heir, last, waiting, my_ttl
    elseif manager and is_subscribed(channel .. manager) then
      local last = reserve(n, floor)
      redis.call('SET', KEYS[1], heir, 'PX', ttl)
      notify(channel .. manager, string.format('g %s %.0f %d %d ', cycle, last, n, waiting) .. key)
      return heir, last, waiting, ttl
    elseif manager and string.find(score, '.5', 1, true) then
      ttl = math.min(UNNOTIFIED_LEASE, tonumber(ttl))
      redis.call('SET', KEYS[1], heir, 'PX', ttl)
      return heir, reserve(1, floor), waiting, ttl
    end
  end
  redis.call('DEL', KEYS[1])
  return nil
end

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

-- Takes the lease, extends it, or enqueues; a try never enqueues.
local function acquire(owner, me, ttl, n, floor, try, channel, key)
  if owner == me then
    return extend(ttl, n, floor)
  end
  if owner then
    if try then
      return {0}
    end
    local mark, ahead, new, reached = join(me, floor, channel .. member(me))
    local manager, cycle = signed(owner)
    -- For the first waiter, and again whenever a waiter retries.
    if manager and (ahead == 0 or not new) and wants_notice(cycle) then
      notify(channel .. manager, 'w ' .. cycle .. ' ' .. key)
    end
    return queued(mark, not manager, ahead, reached)
  end
  local head = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not head or head == me then
    local last = reserve(n, floor)
    redis.call('SET', KEYS[1], me, 'PX', ttl)
    if head then
      redis.call('ZREM', KEYS[2], me)
    end
    return {1, last, head and redis.call('ZCARD', KEYS[2]) or 0, 0}
  end
  -- The owner died and other waiters are ahead of us.
  if try then
    local heir = pass_on(nil, nil, n, floor, channel, key)
    if heir then
      return {0}
    end
    redis.call('SET', KEYS[1], me, 'PX', ttl)
    return {1, reserve(n, floor), 0, 0}
  end
  local _, _, _, reached = join(me, floor, channel .. member(me))
  local heir, last, waiting = pass_on(me, ttl, n, floor, channel, key)
  if heir == me then
    return {1, last, waiting, 0}
  end
  return queued(last, false, redis.call('ZRANK', KEYS[2], me), reached)
end
