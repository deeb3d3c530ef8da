-- The beginning of the acquire script: handles the most frequent request of a busy process before
-- the functions that only other requests need are defined.
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  return extend(ARGV[2], ARGV[3], tonumber(ARGV[4]))
end
if ARGV[5] == 'extend' then
  return {0}
end
