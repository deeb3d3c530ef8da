//! Executing commands and writing their replies.

use std::io;
use std::sync::Arc;

use shardlock::LockKey;
use shardlock::error::LockErrorKind;

use super::acquire::error_reply;
use super::command::{ClientCommand, Command, CommandQuery, Credentials, Hello, LockId};
use super::command_table::COMMANDS;
use super::describe;
use super::replies::Protocol;
use super::session::{Flow, Session};

impl Session {
    pub(super) async fn execute(&mut self, command: Command) -> io::Result<Flow> {
        let needs_no_password = matches!(
            command,
            Command::Hello(_) | Command::Auth(_) | Command::Quit | Command::Http
        );
        if !self.is_authenticated && !needs_no_password {
            self.replies.error("NOAUTH Authentication required.");
            return Ok(Flow::Continue);
        }
        match command {
            Command::Lock(lock) => return self.lock(lock).await,
            Command::Unlock(id) => self.unlock(&id).await?,
            Command::Held(id) => self.held(&id),
            Command::Inspect(key) => self.inspect(&key).await?,
            Command::Info => self.replies.bulk(describe::info(&self.agent)),
            Command::Ping(None) => self.replies.simple("PONG"),
            Command::Ping(Some(text)) | Command::Echo(text) => self.replies.bulk(text),
            Command::Hello(hello) => self.hello(hello),
            Command::Auth(credentials) => self.auth(&credentials),
            Command::Client(command) => self.client_command(command),
            Command::Commands(query) => self.commands(query),
            Command::Select => self.replies.simple("OK"),
            Command::Http => {
                tracing::warn!(
                    client = self.client.id,
                    peer = %self.client.peer,
                    "a client sent an HTTP request, perhaps for a page on the web; its connection is closed"
                );
                return Ok(Flow::Close);
            }
            Command::Quit => {
                self.replies.simple("OK");
                return Ok(Flow::Close);
            }
        }
        Ok(Flow::Continue)
    }

    /// Replies 1 if the lock was held until now, by any connection, and 0 otherwise.
    async fn unlock(&mut self, id: &LockId) -> io::Result<()> {
        let Some(held) = self.agent.held.remove(id) else {
            self.replies.integer(0);
            return Ok(());
        };
        let released = self.answer(held.guard.release()).await?;
        // The connection that was granted the lock replies first: nobody works until its client
        // knows, and the client of this connection would compete with it for the processor.
        tokio::task::yield_now().await;
        match released {
            Ok(()) => self.replies.integer(1),
            Err(error) => match error.kind() {
                LockErrorKind::Lost => self.replies.integer(0),
                // It was valid until now. The release is repeated until the shard answers.
                LockErrorKind::Unavailable => self.replies.integer(1),
                _ => self.replies.error(&error_reply(&error)),
            },
        }
        Ok(())
    }

    async fn inspect(&mut self, key: &LockKey) -> io::Result<()> {
        let agent = Arc::clone(&self.agent);
        match self.answer(agent.locks.inspect(key)).await? {
            Ok(state) => describe::key_state(&mut self.replies, &agent, key, &state),
            Err(error) => self.replies.error(&error_reply(&error)),
        }
        Ok(())
    }

    /// Replies for how many milliseconds a lock is certainly held.
    fn held(&mut self, id: &LockId) {
        let remaining = self.agent.held.remaining(id).as_millis();
        self.replies.integer(i64::try_from(remaining).unwrap_or(i64::MAX));
    }

    fn hello(&mut self, hello: Hello) {
        if let Some(credentials) = &hello.credentials
            && !self.authenticate(credentials)
        {
            return;
        }
        if !self.is_authenticated {
            self.replies.error(
                "NOAUTH HELLO must be called with the client already authenticated, otherwise the \
                 HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client and \
                 select the RESP protocol version at the same time",
            );
            return;
        }
        match hello.version {
            Some(2) => self.replies.protocol = Protocol::Resp2,
            Some(_) => self.replies.protocol = Protocol::Resp3,
            None => {}
        }
        if let Some(name) = hello.name {
            self.client.change_names(|names| names.name = name);
        }
        describe::hello(&mut self.replies, self.client.id);
    }

    fn auth(&mut self, credentials: &Credentials) {
        if credentials.user.is_none() && !self.agent.access.needs_password() {
            self.replies.error(
                "ERR AUTH <password> called without any password configured for the default user. \
                 Are you sure your configuration is correct?",
            );
        } else if self.authenticate(credentials) {
            self.replies.simple("OK");
        }
    }

    /// Replies only if the credentials are wrong.
    fn authenticate(&mut self, credentials: &Credentials) -> bool {
        let is_right = self.agent.access.accepts(credentials);
        if is_right {
            self.is_authenticated = true;
        } else {
            let peer = self.client.peer;
            tracing::warn!(client = self.client.id, %peer, "a client sent a wrong user name or password");
            self.replies
                .error("WRONGPASS invalid username-password pair or user is disabled.");
        }
        is_right
    }

    fn client_command(&mut self, command: ClientCommand) {
        match command {
            ClientCommand::Id => self.replies.integer(describe::number(self.client.id)),
            ClientCommand::Info => {
                let line = describe::client_line(&self.client, self.replies.protocol);
                self.replies.bulk(line);
            }
            ClientCommand::GetName => match self.client.names().name {
                name if name.is_empty() => self.replies.null(),
                name => self.replies.bulk(name),
            },
            ClientCommand::SetName(name) => {
                self.client.change_names(|names| names.name = name);
                self.replies.simple("OK");
            }
            ClientCommand::SetLibraryName(name) => {
                self.client.change_names(|names| names.library = name);
                self.replies.simple("OK");
            }
            ClientCommand::SetLibraryVersion(version) => {
                self.client.change_names(|names| names.library_version = version);
                self.replies.simple("OK");
            }
        }
    }

    fn commands(&mut self, query: CommandQuery) {
        let all = || COMMANDS.iter();
        match query {
            CommandQuery::Count => self.replies.integer(describe::number(COMMANDS.len() as u64)),
            CommandQuery::List => {
                self.replies.array(COMMANDS.len());
                all().for_each(|command| self.replies.bulk(command.name));
            }
            CommandQuery::Info(names) => {
                let found = names.unwrap_or_else(|| all().map(Some).collect());
                self.replies.array(found.len());
                for command in found {
                    match command {
                        Some(command) => describe::command(&mut self.replies, command),
                        None => self.replies.null(),
                    }
                }
            }
            CommandQuery::Docs(names) => {
                let found = names.unwrap_or_else(|| all().collect());
                self.replies.map(found.len());
                for command in found {
                    describe::command_docs(&mut self.replies, command);
                }
            }
        }
    }
}
