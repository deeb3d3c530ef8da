-- ARGV: 1 signature, 2 tokens of the next owner, 3 floor, 4 channel prefix, 5 key, 6 next signature
-- or ''.
-- Replies: {1 if it was ours, else 0; with a next signature, followed by the reply to its acquire}
local me, n, floor, channel, key, next = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
-- The TTL of a cycle is part of its signature.
local manager, _, ttl = member(next)
local owner = redis.call('GET', KEYS[1])
if owner ~= me then
  -- A cycle that owns the lease is never in the queue.
  redis.call('ZREM', KEYS[2], me)
  if next == '' then
    -- The lease was deleted or has expired: grant it to the head, which need not find out by
    -- itself.
    if not owner then
      pass_on(nil, nil, n, floor, channel, key)
    end
    return {0}
  end
  return {0, unpack(acquire(owner, next, ttl, n, floor, false, channel, key))}
end
if next == '' then
  pass_on(nil, nil, n, floor, channel, key)
  return {1}
end
local _, ahead, new, reached = join(next, floor, channel .. manager)
local heir, last, waiting, left = pass_on(next, ttl, n, floor, channel, key, new and ahead + 1)
if heir == next then
  return {1, 1, last, waiting, 0}
end
-- A newly enqueued cycle is the last.
ahead = new and waiting - 1 or redis.call('ZRANK', KEYS[2], next)
return {1, unpack(queued(last, false, ahead, reached, left))}
