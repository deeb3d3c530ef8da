-- The begin of acquire.lua: what a busy process asks for most often, before the functions that only others need are made.
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  return extend(ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]))
end
if ARGV[5] == 'extend' then
  return {0}
end
