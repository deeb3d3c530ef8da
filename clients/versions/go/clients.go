// Package main builds everything that a program with the client needs.
package main

import _ "github.com/redis/go-redis/v9"

func main() {}
