// Package undo is a stack of steps that take back what a half-done operation did.
package undo

import "errors"

// Stack collects undo steps; the zero value is ready. It is not safe for concurrent use.
//
//	var u undo.Stack
//	defer u.Run(&err)
//	…do a…; u.Push(undoA)
type Stack struct {
	steps []func() error
}

// Push adds a step that takes back what was just done.
func (s *Stack) Push(step func() error) { s.steps = append(s.steps, step) }

// Run undoes all steps, newest first, if *err is not nil. Failures of steps are joined to *err; they
// never stop the steps after them.
func (s *Stack) Run(err *error) {
	if *err == nil {
		return
	}
	for i := len(s.steps) - 1; i >= 0; i-- {
		if e := s.steps[i](); e != nil {
			*err = errors.Join(*err, e)
		}
	}
	s.steps = nil
}
