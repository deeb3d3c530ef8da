//! Fencing tokens as parameters and columns of queries with sqlx.

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::{Database, Decode, Encode, Type};

use crate::fence::FencingToken;

/// A token is stored as an `i64`, which is a `BIGINT` in PostgreSQL and MySQL and an `INTEGER` in
/// SQLite. With the feature `sqlx`, which is for sqlx 0.8.
impl<DB: Database> Type<DB> for FencingToken
where
    i64: Type<DB>,
{
    fn type_info() -> DB::TypeInfo {
        <i64 as Type<DB>>::type_info()
    }

    fn compatible(column: &DB::TypeInfo) -> bool {
        <i64 as Type<DB>>::compatible(column)
    }
}

/// Fails for a token that is no `i64`, which no server issues: see [`TokenRangeError`].
///
/// [`TokenRangeError`]: crate::error::TokenRangeError
impl<'q, DB: Database> Encode<'q, DB> for FencingToken
where
    i64: Encode<'q, DB>,
{
    fn encode_by_ref(&self, buffer: &mut DB::ArgumentBuffer<'q>) -> Result<IsNull, BoxDynError> {
        i64::try_from(*self)?.encode(buffer)
    }
}

/// Fails for numbers below 1, which are no tokens. A column that begins with 0, as in the guide to
/// fencing in SQL, is read as an `i64` or an `Option`-like value of your own.
impl<'r, DB: Database> Decode<'r, DB> for FencingToken
where
    i64: Decode<'r, DB>,
{
    fn decode(value: DB::ValueRef<'r>) -> Result<Self, BoxDynError> {
        Ok(i64::decode(value)?.try_into()?)
    }
}
