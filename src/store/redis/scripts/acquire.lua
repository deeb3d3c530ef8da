-- ARGV: 1 owner tag, 2 TTL in ms, 3 tokens to reserve, 4 floor, 5 'join', 'known', 'try' or
-- 'extend', 6 channel prefix, 7 key. 'known' is the join of a manager whose inbox was subscribed
-- here a moment ago.
-- Replies: {0} busy | {1, largest token, queue length, 1 if it was ours before}
--   | {2, mark, owner's TTL, owner, ahead, reached} | {3} acquire_modes.lua must run
return acquire(owner, ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == 'try', ARGV[6], ARGV[7])
