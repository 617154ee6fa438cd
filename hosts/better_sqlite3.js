// better-sqlite3, which has a copy of SQLite of its own, and is built without URIs: opened by plain path.
'use strict';
const Database = require('better-sqlite3');
const { serve } = require('./line_protocol.js');
const { KANBANLOCK, DATABASE } = process.env;

if (KANBANLOCK) {
  // kanbanlock: load
  new Database(':memory:').loadExtension(KANBANLOCK, 'sqlite3_kanbanlockdefault_init');
  // kanbanlock: end
}

const db = new Database(DATABASE, { timeout: 0 });

const execute = (sql, ...parameters) => {
  const statement = db.prepare(sql);
  if (statement.reader) return statement.pluck().get(...parameters);
  statement.run(...parameters);
};

serve(execute('SELECT sqlite_version()'), execute, (error) => error.code === 'SQLITE_BUSY');
