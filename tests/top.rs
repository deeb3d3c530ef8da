//! `shardlock top`.
