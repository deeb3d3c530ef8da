-- The common case comes before anything else is defined: ours, and nobody waits.
-- ARGV: 1 signature, 2 ttl in ms and 3 tokens of the next owner, 4 floor, 5 channel prefix, 6 key, 7 next signature or ''
local held = redis.call('GET', KEYS[1]) == ARGV[1]
if held and ARGV[7] == '' and redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('DEL', KEYS[1])
  return {1}
end
