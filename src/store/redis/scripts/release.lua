-- ARGV and replies: see release_own.lua.
local me, n, floor, channel, key, next = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
-- The TTL of a cycle is part of its owner tag.
local manager, _, ttl = member(next)
if owner ~= me then
  -- A cycle that owns the lease is never in the queue.
  redis.call('ZREM', KEYS[2], me)
  if owner == MARKER then
    -- The next cycles may be admissible without it.
    return {3}
  end
  if next == '' then
    -- The lease was deleted or has expired: grant it to the head, which need not find out by
    -- itself.
    if not owner and pass_on(nil, nil, n, floor, channel, key) == false then
      return {3}
    end
    return {0}
  end
  local reply = acquire(owner, next, ttl, n, floor, false, channel, key)
  if reply[1] == 3 then
    return reply
  end
  return {0, unpack(reply)}
end
-- It is ours, and its manager asks again.
local mark, ahead, new, reached = join(next, floor, channel .. manager)
local heir, last, waiting, left = pass_on(next, ttl, n, floor, channel, key, new and ahead + 1, mark, new)
if heir == false then
  return {3}
end
if heir == next then
  return {1, 1, last, waiting, 0}
end
-- A newly enqueued cycle is the last.
ahead = new and waiting - 1 or redis.call('ZRANK', KEYS[2], next)
return {1, unpack(queued(last, false, ahead, reached, left))}
