#!/bin/bash
mv delivery.csv deliveries-today.csv
