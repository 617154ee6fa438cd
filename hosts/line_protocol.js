// The line protocol of hosts/run.py, for the hosts in Node.js: line_protocol.py says what it is.
'use strict';

// execute: runs one SQL statement, with one parameter or none, and returns its first value, if any.
// isBusy: tells whether an error means SQLITE_BUSY.
exports.serve = (version, execute, isBusy) => {
  const answer = (line) => {
    const [command] = line.split(' ', 1);
    switch (command) {
      case 'begin': return execute('BEGIN IMMEDIATE');
      case 'write': return execute('INSERT INTO task VALUES (?)', line.slice('write '.length));
      case 'commit': return execute('COMMIT');
      case 'count': return execute('SELECT count(*) FROM task');
      default: throw new Error(`unknown command ${command}`);
    }
  };
  console.log(`ready ${version}`);
  require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => {
    try {
      const value = answer(line);
      console.log(value === undefined ? 'ok' : `ok ${value}`);
    } catch (error) {
      console.log(isBusy(error) ? 'busy' : `error ${error}`);
    }
  });
};
