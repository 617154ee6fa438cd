// node:sqlite, of Node.js 22 or later, opened by URI.
'use strict';
const { DatabaseSync } = require('node:sqlite');
const { serve } = require('./line_protocol.js');
const { KANBANLOCK, DATABASE } = process.env;

let db;
if (KANBANLOCK) {
  // kanbanlock: load
  new DatabaseSync(':memory:', { allowExtension: true }).loadExtension(KANBANLOCK);
  // kanbanlock: open
  db = new DatabaseSync(`file:${DATABASE}?vfs=kanbanlock`);
  // kanbanlock: end
} else {
  db = new DatabaseSync(DATABASE);
}

const execute = (sql, ...parameters) => {
  const row = db.prepare(sql).get(...parameters);
  return row && Object.values(row)[0];
};

serve(execute('SELECT sqlite_version()'), execute, (error) => error.errcode === 5);
