-- ARGV and replies: see release_own.lua; never {3}.
local me, next = ARGV[1], ARGV[6]
n, floor, channel, key = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local held = is_held(me)
if waiting > 0 and not held then
  waiting = waiting - redis.call('ZREM', KEYS[2], me)
end
if held then
  remove(me)
end
local ours = held and 1 or 0
if next == '' then
  advance()
  finish()
  return {ours}
end
-- The TTL of a cycle is part of its owner tag.
local _, _, ttl = member(next)
ttl = tonumber(ttl)
if is_held(next) then
  -- An earlier attempt had it join, and it was served since. It is in no queue now.
  advance()
elseif held then
  -- In this order, so that a cycle never passes those that were there before.
  return {ours, unpack(enqueue(next, ttl))}
end
return {ours, unpack(acquire(next, ttl, 'join'))}
