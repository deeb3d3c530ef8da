//! The password of the agent.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use parking_lot::RwLock;
use subtle::ConstantTimeEq;

use super::command::Credentials;

/// Who may send commands.
pub(super) struct Access {
    file: Option<PathBuf>,
    /// `None` if every connection may send commands.
    password: RwLock<Option<Vec<u8>>>,
}

/// The longest password, in bytes.
const PASSWORD_BYTES_MAX: usize = 512;

impl Access {
    /// Reads the password file, if there is one.
    pub(super) fn load(file: Option<PathBuf>) -> Result<Self> {
        let password = file.as_deref().map(read).transpose()?;
        Ok(Self {
            file,
            password: RwLock::new(password),
        })
    }

    /// Reads the password file again. After an error, the password stays as it was.
    pub(super) fn reload(&self) -> Result<()> {
        if let Some(file) = &self.file {
            *self.password.write() = Some(read(file)?);
        }
        Ok(())
    }

    pub(super) fn needs_password(&self) -> bool {
        self.password.read().is_some()
    }

    /// Whether the credentials are right. The time that this takes depends only on the length of
    /// the password.
    pub(super) fn accepts(&self, credentials: &Credentials) -> bool {
        if credentials.user.is_some() {
            return false;
        }
        match &*self.password.read() {
            Some(password) => password.ct_eq(&credentials.password).into(),
            // Without a password, Redis accepts any.
            None => true,
        }
    }
}

/// Reads the first line of a password file.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>> {
    let name = file.display();
    let text = fs::read(file).with_context(|| format!("the password file {name} can't be read"))?;
    let line = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let password = line.strip_suffix(b"\r").unwrap_or(line);
    let length = password.len();
    ensure!(
        (1..=PASSWORD_BYTES_MAX).contains(&length),
        "the first line of the password file {name} has {length} bytes, but must have 1 to \
         {PASSWORD_BYTES_MAX}"
    );
    Ok(password.to_vec())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn accepts(access: &Access, user: Option<&str>, password: &str) -> bool {
        access.accepts(&Credentials {
            user: user.map(|user| user.as_bytes().to_vec()),
            password: password.as_bytes().to_vec(),
        })
    }

    #[test]
    fn first_line_of_the_file_is_the_password_until_it_is_read_again() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"one\r\nsecond line\n").unwrap();
        let access = Access::load(Some(file.path().to_owned())).unwrap();
        assert!(access.needs_password() && accepts(&access, None, "one"));
        assert!(!accepts(&access, None, "on") && !accepts(&access, Some("root"), "one"));

        fs::write(file.path(), "two").unwrap();
        access.reload().unwrap();
        assert!(accepts(&access, None, "two") && !accepts(&access, None, "one"));

        fs::write(file.path(), "\n").unwrap();
        let error = access.reload().unwrap_err().to_string();
        assert!(error.contains("0 bytes") && accepts(&access, None, "two"), "{error}");
    }

    #[test]
    fn without_a_file_no_password_is_needed() {
        let access = Access::load(None).unwrap();
        assert!(!access.needs_password() && accepts(&access, None, "any"));
    }
}
