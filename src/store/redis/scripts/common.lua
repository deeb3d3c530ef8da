-- Shared by acquire.lua and release.lua, which come after it in the same script. Before it come
-- single.lua or cluster.lua, with is_subscribed(), notify() and reserve(), and extend.lua.
--
-- KEYS: 1 lease, 2 queue (sorted set of signatures, score = the counter when it joined, plus a half
-- if its inbox was not subscribed here), 3 counter of the slot.

-- The manager, the cycle and the TTL of a signature; nil for a value that another library wrote. A
-- signature is `<manager>:<cycle>`, a cycle `<number>-<ttl>-<code>`.
local function signed(signature)
  local manager, cycle, ttl = string.match(signature, '^([%w%.%-]+):(%d+%-(%d+)%-%x%x%x%x%x%x%x%x)$')
  -- `<host>-<process id>-<16 digits>`, looked at from its end: one pattern for all would try each dash.
  if manager and string.find(manager, '^%-%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x$', -17)
    and string.find(string.sub(manager, -29, -18), '.%-%d+$') then
    return manager, cycle, ttl
  end
end

-- The same of a member of the queue, where managers alone write.
local function member(signature)
  return string.match(signature, '^([^:]+):(%d+%-(%d+)%-%x+)$')
end

-- Whether the owner of a cycle asked to be notified when somebody begins to wait: its number is even.
local function wants_notice(cycle)
  return tonumber(string.match(cycle, '(%d)%-')) % 2 == 0
end

-- A manager whose inbox is not subscribed on this server asks again and again instead, every quarter
-- of a second. When it is its turn, the lease waits for its next request for this long at most, in
-- milliseconds.
local UNNOTIFIED_LEASE = 1000

-- Makes the first in the queue the owner and notifies it. Where nothing reaches its inbox, the next
-- one is tried: nothing was published then, and no token reserved, so the one that was passed over can
-- never enter. `me` learns of it by the reply instead; its lease lasts for `my_ttl`, any other for the
-- TTL of its cycle. `waiting` is the length of the queue, if that is known. Returns the new owner, its
-- largest token, how many still wait and the TTL of its lease; deletes the lease if nobody is left. Looks
-- at the queue no more once it is empty: in a slot of a cluster that is being moved, a key that is gone
-- can't be asked for.
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

-- A place in the queue outlives those who wait by this much, in milliseconds, if all of them die.
local QUEUE_GRACE = 60000

-- The reply to a cycle that waits: 2, mark, remaining TTL of the owner (-1: endless), whether the
-- owner is foreign, how many are ahead, whether a grant would reach it. `left` is that TTL, if it is known.
local function queued(mark, foreign, ahead, reached, left)
  left = left and tonumber(left) or redis.call('PTTL', KEYS[1])
  -- Numbers are written here: the server would do it with 17 digits, which takes several times as long.
  redis.call('PEXPIRE', KEYS[2], string.format('%d', math.max(left, 0) + QUEUE_GRACE))
  return {2, mark, left, foreign and 1 or 0, ahead, reached and 1 or 0}
end

-- Joins the queue unless it is in it. Returns its mark, how many are ahead, whether it was new, and
-- whether a grant would reach its inbox.
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

-- Takes the lease, extends it, or joins the queue; a try does not join.
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
    -- When the first comes, and again when one asks again.
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
  -- The owner died and somebody is before us.
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
