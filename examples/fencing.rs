//! A resource that compares fencing tokens rejects a holder that has lost its lock without knowing
//! it.

use shardlock::{FencingToken, LockManager};

/// Whatever the lock protects: a file, a table, a bucket.
#[derive(Default)]
struct Resource {
    largest: Option<FencingToken>,
    value: &'static str,
}

impl Resource {
    fn write(&mut self, token: FencingToken, value: &'static str) -> Result<(), String> {
        if self.largest.is_some_and(|largest| token < largest) {
            return Err(format!(
                "refused {value:?}: token {token} is older than {:?}",
                self.largest
            ));
        }
        (self.largest, self.value) = (Some(token), value);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), shardlock::LockError> {
    let locks = LockManager::connect("memory://").await?;
    let mut resource = Resource::default();

    let slow = locks.lock("report").await?;
    let slow_token = slow.token();
    slow.release().await?;

    let quick = locks.lock("report").await?;
    println!("{:?}", resource.write(quick.token(), "from the new holder"));
    // The old holder was paused before its write and continues now.
    println!("{:?}", resource.write(slow_token, "from the old holder"));
    println!("the value is now {:?}", resource.value);
    quick.release().await
}
