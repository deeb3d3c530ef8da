-- Renews one shared lease or permit without accessing its lease and its queue, as renew_alone.lua
-- does it for an exclusive one. The marker was renewed before by renew_alone.lua.
--
-- KEYS: 1 holders. ARGV: 1 owner tag, 2 TTL in ms.
-- Replies: {0} not ours | {1} extended. See renew.lua.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local rank = redis.pcall('ZRANK', KEYS[1], ARGV[1])
if type(rank) == 'table' and string.sub(rank.err, 1, 9) ~= 'WRONGTYPE' then
  return rank
end
if type(rank) ~= 'number' then
  return {0}
end
local ends = tonumber(redis.call('ZRANGE', KEYS[1], rank, rank, 'WITHSCORES')[2])
if ends <= now then
  return {0}
end
-- First, as in renew_modes.lua.
local left = redis.call('PTTL', KEYS[1])
redis.call('PEXPIRE', KEYS[1], math.max(left, tonumber(ARGV[2])))
if ends < now + tonumber(ARGV[2]) then
  redis.call('ZADD', KEYS[1], 'XX', string.format('%.0f', now + tonumber(ARGV[2])), ARGV[1])
end
return {1}
