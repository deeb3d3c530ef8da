-- ARGV and replies: see acquire.lua; never 'known' and never {3}.
n, floor, channel, key = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[6], ARGV[7]
return acquire(ARGV[1], tonumber(ARGV[2]), ARGV[5])
