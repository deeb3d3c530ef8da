-- Shared by acquire.lua and release.lua, which follow in the same script and serve exclusive
-- cycles. Before it come extend.lua, queue.lua and pass_on.lua.

-- Takes the lease, extends it, or enqueues; a try never enqueues. {3} means that nothing was done
-- since another mode is concerned: modes.lua must serve the request.
local function acquire(owner, me, ttl, n, floor, try, channel, key)
  if owner == me then
    return extend(ttl, n, floor)
  end
  if owner then
    if owner == MARKER then
      return {3}
    end
    if try then
      return {0}
    end
    -- For release.lua: acquire_behind.lua has answered an acquire before.
    return enqueue_behind(owner, me, floor, channel, key)
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
    if heir == false then
      return {3}
    end
    if heir then
      return {0}
    end
    redis.call('SET', KEYS[1], me, 'PX', ttl)
    return {1, reserve(n, floor), 0, 0}
  end
  local mark, _, new, reached = join(me, floor, channel .. member(me))
  local heir, last, waiting = pass_on(me, ttl, n, floor, channel, key, nil, mark, new)
  if heir == false then
    return {3}
  end
  if heir == me then
    return {1, last, waiting, 0}
  end
  return queued(last, false, redis.call('ZRANK', KEYS[2], me), reached)
end
