-- Shared by acquire.lua and release.lua, which come after it in the same script. Before it comes single.lua or cluster.lua,
-- with tell() and reserve().
--
-- KEYS: 1 lease, 2 queue (sorted set of signatures, score = the counter when it joined), 3 counter of the slot.

-- The manager and the cycle of a signature; nil for a value that another library wrote.
local function signed(signature)
  return string.match(signature, '^([%w%.%-]+%-%d+%-%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x):(%d+)$')
end

-- Makes the first in the queue the owner and tells it; goes on to the next where nobody listens (a dead process).
-- `me` is told by the reply instead. Returns the new owner, its largest token and how many still wait; deletes the lease where nobody
-- is left. Looks at the queue no more once it is empty: in a slot of a cluster that is being moved, a key that is gone can't be asked for.
local function pass_on(me, ttl, n, floor, channel, key)
  local last
  local waiting = redis.call('ZCARD', KEYS[2])
  while waiting > 0 do
    local heir = redis.call('ZPOPMIN', KEYS[2])[1]
    waiting = waiting - 1
    last = last or reserve(n, floor)
    redis.call('SET', KEYS[1], heir, 'PX', ttl)
    if heir == me then
      return heir, last, waiting
    end
    local manager, cycle = signed(heir)
    if manager then
      local grant = string.format('g %s %.0f %d %s %d ', cycle, last, n, ttl, waiting)
      if tell(channel .. manager, grant .. key) > 0 then
        return heir, last, waiting
      end
    end
  end
  redis.call('DEL', KEYS[1])
  return nil
end

-- A place in the queue outlives those who wait by this much, in milliseconds, if all of them die.
local QUEUE_GRACE = 60000

-- The reply of one who waits: 2, mark, remaining TTL of the owner (-1: endless), whether the owner is foreign, who is ahead.
local function queued(mark, foreign, ahead)
  local left = redis.call('PTTL', KEYS[1])
  -- Numbers are written here: the server would do it with 17 digits, which takes several times as long.
  redis.call('PEXPIRE', KEYS[2], string.format('%d', math.max(left, 0) + QUEUE_GRACE))
  return {2, mark, left, foreign and 1 or 0, ahead}
end

-- Joins the queue unless it is in it. Returns its mark, and how many are ahead; the third says whether it was new.
local function join(me, floor)
  local mark = reserve(1, floor)
  if redis.call('ZADD', KEYS[2], 'NX', string.format('%.0f', mark), me) == 1 then
    return mark, redis.call('ZCARD', KEYS[2]) - 1, true
  end
  return mark, redis.call('ZRANK', KEYS[2], me), false
end

-- Takes the lease, extends it, or joins the queue; a try does not join.
local function acquire(me, ttl, n, floor, try, channel, key)
  local owner = redis.call('GET', KEYS[1])
  if owner == me then
    local last = reserve(n, floor)
    -- Never back: see renew.lua.
    if redis.call('PTTL', KEYS[1]) < tonumber(ttl) then
      redis.call('PEXPIRE', KEYS[1], ttl)
    end
    return {1, last, redis.call('ZCARD', KEYS[2]), 1}
  end
  if owner then
    if try then
      return {0}
    end
    local mark, ahead, new = join(me, floor)
    local manager, cycle = signed(owner)
    -- The owner of an even cycle does not reckon with rivals: it is told when the first comes, and again when one asks again.
    if manager and (ahead == 0 or not new) and string.byte(cycle, -1) % 2 == 0 then
      tell(channel .. manager, 'w ' .. cycle .. ' ' .. key)
    end
    return queued(mark, not manager, ahead)
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
    local heir = pass_on(nil, ttl, n, floor, channel, key)
    if heir then
      return {0}
    end
    redis.call('SET', KEYS[1], me, 'PX', ttl)
    return {1, reserve(n, floor), 0, 0}
  end
  join(me, floor)
  local heir, last, waiting = pass_on(me, ttl, n, floor, channel, key)
  if heir == me then
    return {1, last, waiting, 0}
  end
  return queued(last, not signed(heir), redis.call('ZRANK', KEYS[2], me))
end
