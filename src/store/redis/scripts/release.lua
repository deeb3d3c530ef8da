-- ARGV: 1 signature, 2 ttl in ms and 3 tokens of the next owner, 4 floor, 5 channel prefix, 6 key, 7 next signature or ''
-- Replies: {1 if it was ours, else 0, and where a next signature was given, the reply of its acquire}
local me, ttl, n, floor, channel, key, next = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7]
if redis.call('GET', KEYS[1]) ~= me then
  -- It can't be in the queue and own the lease.
  redis.call('ZREM', KEYS[2], me)
  if next == '' then
    return {0}
  end
  return {0, unpack(acquire(next, ttl, n, floor, false, channel, key))}
end
if next == '' then
  pass_on(nil, ttl, n, floor, channel, key)
  return {1}
end
join(next, floor)
local heir, last, waiting = pass_on(next, ttl, n, floor, channel, key)
if heir == next then
  return {1, 1, last, waiting, 0}
end
return {1, unpack(queued(last, not signed(heir), redis.call('ZRANK', KEYS[2], next)))}
