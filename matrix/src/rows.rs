//! The table: one row for each library and version, and the package that is written from it.
//!
//! Versions are pinned here, and what they depend on in `locks/<row>.lock`.

/// A library under kanbanlock.
pub struct Row {
    /// As in docs/RUST.md; the package's name is made from it.
    pub name: &'static str,
    /// `rows/<program>.rs`
    pub program: &'static str,
    /// Lines of the package's `[dependencies]`, beside kanbanlock itself.
    pub dependencies: &'static [&'static str],
    /// What the library takes for a database in the working directory.
    pub database: Database,
}

/// How a library names a database and, if at all, a VFS.
#[derive(Clone, Copy)]
pub enum Database {
    /// SQLite's own: `kanban.db`, `file:kanban.db?vfs=kanbanlock` <https://www.sqlite.org/uri.html>
    Sqlite,
    /// sqlx's URL: `sqlite:kanban.db`, `sqlite:kanban.db?vfs=kanbanlock`
    Sqlx,
}

impl Database {
    pub fn plain(self) -> &'static str {
        match self {
            Database::Sqlite => "kanban.db",
            Database::Sqlx => "sqlite:kanban.db",
        }
    }

    pub fn through(self, vfs: &str) -> String {
        match self {
            Database::Sqlite => format!("file:kanban.db?vfs={vfs}"),
            Database::Sqlx => format!("sqlite:kanban.db?vfs={vfs}"),
        }
    }
}

impl Row {
    /// `sea-orm 2.0` is `sea-orm-2-0`: the name of the package, its program and its lock file.
    pub fn package(&self) -> String {
        self.name
            .to_lowercase()
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
            .join("-")
    }
}

const TOKIO: &str = r#"tokio = { version = "=1.54.1", features = ["macros", "rt-multi-thread", "time"] }"#;

/// Ordered so that rows that share most of what they build stand together.
pub const ROWS: &[Row] = &[
    rusqlite("rusqlite 0.29", &[r#"rusqlite = { version = "=0.29.0", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.31", &[r#"rusqlite = { version = "=0.31.0", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.32", &[r#"rusqlite = { version = "=0.32.1", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.34", &[r#"rusqlite = { version = "=0.34.0", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.37", &[r#"rusqlite = { version = "=0.37.0", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.39", &[r#"rusqlite = { version = "=0.39.0", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.41", &[r#"rusqlite = { version = "=0.41.1", features = ["bundled"] }"#]),
    rusqlite("rusqlite 0.43", &[r#"rusqlite = { version = "=0.43.0", features = ["bundled"] }"#]),
    Row {
        name: "r2d2_sqlite 0.35",
        program: "r2d2_sqlite",
        dependencies: &[
            r#"r2d2 = "=0.8.10""#,
            r#"r2d2_sqlite = { version = "=0.35.0", features = ["bundled"] }"#,
        ],
        database: Database::Sqlite,
    },
    Row {
        name: "tokio-rusqlite 0.8",
        program: "tokio_rusqlite",
        dependencies: &[TOKIO, r#"tokio-rusqlite = { version = "=0.8.0", features = ["bundled"] }"#],
        database: Database::Sqlite,
    },
    Row {
        name: "deadpool-sqlite 0.14",
        program: "deadpool_sqlite",
        dependencies: &[TOKIO, r#"deadpool-sqlite = { version = "=0.14.0", features = ["bundled"] }"#],
        database: Database::Sqlite,
    },
    Row {
        name: "diesel 2.3",
        program: "diesel",
        dependencies: &[
            r#"diesel = { version = "=2.3.14", default-features = false, features = ["sqlite"] }"#,
            r#"libsqlite3-sys = { version = "=0.37.0", features = ["bundled"] }"#,
        ],
        database: Database::Sqlite,
    },
    Row {
        name: "sqlx 0.8",
        program: "sqlx",
        dependencies: &[
            TOKIO,
            r#"sqlx = { version = "=0.8.6", default-features = false, features = ["runtime-tokio", "sqlite"] }"#,
        ],
        database: Database::Sqlx,
    },
    Row {
        name: "sqlx 0.9",
        program: "sqlx",
        dependencies: &[
            TOKIO,
            r#"sqlx = { version = "=0.9.0", default-features = false, features = ["runtime-tokio", "sqlite"] }"#,
        ],
        database: Database::Sqlx,
    },
    Row {
        name: "SeaORM 2.0",
        program: "sea_orm",
        dependencies: &[
            TOKIO,
            r#"sea-orm = { version = "=2.0.4", default-features = false, features = ["runtime-tokio", "sqlx-sqlite"] }"#,
        ],
        database: Database::Sqlx,
    },
    Row {
        name: "sqlx 0.9, diesel 2.3 and rusqlite 0.39",
        program: "three_in_one",
        dependencies: &[
            TOKIO,
            r#"diesel = { version = "=2.3.14", default-features = false, features = ["sqlite"] }"#,
            r#"rusqlite = { version = "=0.39.0", features = ["bundled"] }"#,
            r#"sqlx = { version = "=0.9.0", default-features = false, features = ["runtime-tokio", "sqlite"] }"#,
        ],
        database: Database::Sqlite,
    },
    Row {
        name: "static and loadable",
        program: "static_and_loadable",
        dependencies: &[
            r#"libloading = "=0.8.9""#,
            r#"rusqlite = { version = "=0.39.0", features = ["bundled", "load_extension"] }"#,
        ],
        database: Database::Sqlite,
    },
];

const fn rusqlite(name: &'static str, dependencies: &'static [&'static str]) -> Row {
    Row { name, program: "rusqlite", dependencies, database: Database::Sqlite }
}
