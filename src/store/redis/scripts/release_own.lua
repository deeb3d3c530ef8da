-- The beginning of the release script: the lease is ours, and its manager does not ask again. It
-- comes before the functions that only other requests need, since defining them costs time.
--
-- ARGV: 1 owner tag, 2 tokens of the next owner, 3 floor, 4 channel prefix, 5 key, 6 next owner tag
-- or ''.
-- Replies: {1 if it was ours, else 0; with a next owner tag, followed by the reply to its acquire}
--   | {3} release_modes.lua must run
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] and ARGV[6] == '' then
  if pass_on(nil, nil, ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]) == false then
    return {3}
  end
  return {1}
end

