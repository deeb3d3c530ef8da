-- Shared by the scripts that acquire and release for exclusive cycles. Before it comes
-- constants.lua.

-- The manager, the cycle and the TTL of a queue member whose mode is exclusive; nil for any other.
-- Only managers write to the queue.
local function member(owner_tag)
  return string.match(owner_tag, '^([^:]+):(%d+%-(%d+)%-%x+)$')
end

-- Makes the head of the queue the owner and notifies it. If its inbox is not reachable, the next
-- one is tried. Nothing was published to the skipped waiter and no token was reserved for it, so it
-- can never enter. `me` learns of the grant from the reply instead; its lease lasts for `my_ttl`,
-- any other for the TTL of its cycle. `waiting` is the length of the queue, if known. Returns the
-- new owner, its largest token, the number of remaining waiters and the TTL of its lease; nil if no
-- waiter is left, after it has deleted the lease; false if the head is a cycle with another mode,
-- which modes.lua must serve. It will repeat the join of `me`, which is therefore undone: `mark`
-- and `new` are its results, and nobody has seen the mark. Does not access the queue once it is
-- empty: while a cluster slot is being moved, a missing key can't be accessed. Only a cycle with
-- another mode that is alone in the queue is then lost from it, until it asks again. To look before
-- it is removed would cost each hand-off another call.
local function pass_on(me, my_ttl, n, floor, channel, key, waiting, mark, new)
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
      notify(channel .. manager, string.format('g %s %.0f %s %d ', cycle, last, n, waiting) .. key)
      return heir, last, waiting, ttl
    elseif manager and string.find(score, '.5', 1, true) then
      ttl = math.min(UNNOTIFIED_LEASE, tonumber(ttl))
      redis.call('SET', KEYS[1], heir, 'PX', ttl)
      return heir, reserve(1, floor), waiting, ttl
    elseif not manager then
      redis.call('ZADD', KEYS[2], score, heir)
      if waiting == 0 then
        -- The queue was deleted with its last member, and its expiry with it.
        local left = redis.call('PTTL', KEYS[1])
        redis.call('PEXPIRE', KEYS[2], string.format('%d', math.max(left, 0) + QUEUE_GRACE))
      end
      if new then
        redis.call('ZREM', KEYS[2], me)
      end
      if mark then
        redis.call('SET', KEYS[3], string.format('%.0f', mark - 1))
      end
      return false
    end
  end
  redis.call('DEL', KEYS[1])
  return nil
end

